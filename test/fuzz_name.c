/*
 * fuzz_name - a libFuzzer target for what a mailbox's name becomes
 *
 * The first octet chooses the delimiter, what follows up to a NUL is the name, the rest a pattern.
 * A file's name is safe everywhere and leaves no folder; unless it had to be cut, its parts can be
 * got back from it, so that no two names that are valid meet in one file. Modified UTF-7 that
 * decodes is what the decoded text encodes to. The wildcards do what a slow matcher does.
 */
#define main program_main
#include "../imap_backup.c"
#undef main
#define FUZZ
#include "unit.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Modified UTF-7 of valid UTF-8. Returns the length. */
static size_t encode_name(char *out, const char *text, size_t n)
{
	static const char alphabet[] =
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+,";
	uint32_t bits = 0;
	unsigned pending = 0;
	bool inside = false;
	size_t length = 0;

	for (size_t i = 0; i <= n;) {
		const uint8_t *p = (const uint8_t *)text + i;
		size_t octets = i < n ? utf8_char(p, n - i, NULL) : 1;
		uint32_t units[2], c = i < n ? *p : '&';

		must(octets > 0);
		if (octets > 1)
			c &= 0x7Fu >> octets;
		for (size_t k = 1; k < octets; k++)
			c = c << 6 | (p[k] & 0x3F);
		i += octets;
		if (c >= 0x20 && c <= 0x7E) {
			if (inside && pending > 0)
				out[length++] = alphabet[bits << (6 - pending) & 63];
			if (inside)
				out[length++] = '-';
			inside = false;
			pending = 0;
			if (i > n)
				break;
			out[length++] = (char)c;
			if (c == '&')
				out[length++] = '-';
			continue;
		}
		if (!inside)
			out[length++] = '&';
		inside = true;
		units[0] = c < 0x10000 ? c : 0xD800 + ((c - 0x10000) >> 10);
		units[1] = 0xDC00 + ((c - 0x10000) & 0x3FF);
		for (unsigned k = 0; k < (c < 0x10000 ? 1 : 2); k++) {
			bits = bits << 16 | units[k];
			for (pending += 16; pending >= 6; pending -= 6)
				out[length++] = alphabet[bits >> (pending - 6) & 63];
		}
	}
	return length;
}

static unsigned hex(char c)
{
	must(strchr("0123456789ABCDEF", c) != NULL && c != '\0');
	return c <= '9' ? (unsigned)(c - '0') : (unsigned)(c - 'A') + 10;
}

/* The next part of a file's name, escapes undone; parts end at a '.', if they do. */
static size_t file_part(const char **file, const char *end, bool dots_end, char *out)
{
	size_t n = 0;

	for (; *file < end && !(dots_end && **file == '.'); (*file)++)
		if (**file == '%') {
			must(end - *file > 2);
			out[n++] = (char)(hex((*file)[1]) << 4 | hex((*file)[2]));
			*file += 2;
		} else {
			out[n++] = **file;
		}
	*file += *file < end;
	return n;
}

static void check_file(const char *name, char delimiter)
{
	char file[MBOX_FILE_MAX + 8], got[NAME_OCTETS];
	const char *p = file, *end;
	size_t n;

	memset(file, 'x', sizeof file);
	mailbox_file(&(struct mailbox){ .name = (char *)(uintptr_t)name, .delimiter = delimiter }, file);
	must(memchr(file, '\0', sizeof file) != NULL);
	end = file + strlen(file) - 5;
	must(end >= file && end - file <= MBOX_FILE_MAX && strcmp(end, ".mbox") == 0);
	must(*name == '\0' || (file[0] != '.' && file[0] != ' '));
	for (const char *c = file; *c != '\0';) {
		n = utf8_char((const uint8_t *)c, strlen(c), NULL);
		must(n > 0 && (uint8_t)*c >= 0x20 && *c != 0x7F && strchr("/\\:*?\"<>|", *c) == NULL);
		must((uint8_t)*c != 0xC2 || (uint8_t)c[1] >= 0xA0);
		c += n;
	}
	if (end - file > 8 && end[-9] == '~')
		return; /* perhaps cut */
	for (struct name w = { .rest = name, .delimiter = delimiter }; name_next(&w);) {
		if (w.parts == 1 && w.n == 0 && w.rest != NULL) { /* stands for an empty part and the '.' behind it */
			must(strncmp(p, "%2E", 3) == 0);
			p += 3;
			continue;
		}
		must(p <= end);
		must(file_part(&p, end, delimiter != '\0', got) == w.n && memcmp(got, w.part, w.n) == 0);
	}
	must(p == end);
}

static void check_decode(const char *name, size_t n)
{
	char decoded[NAME_OCTETS], encoded[3 * NAME_OCTETS];
	size_t octets = mutf7_decode(decoded, sizeof decoded, name, n);

	if (octets == 0)
		return;
	must(encode_name(encoded, decoded, octets) == n && memcmp(encoded, name, n) == 0);
}

static size_t character(const char *text)
{
	size_t n = *text != '\0' ? utf8_char((const uint8_t *)text, strlen(text), NULL) : 0;

	return n > 0 ? n : 1;
}

/* The same as match(), slowly. */
static bool matches(const char *pattern, const char *text)
{
	if (*pattern == '\0')
		return *text == '\0';
	if (pattern[0] == '*' && pattern[1] == '*')
		return matches(pattern + 1, text);
	if (*pattern == '*')
		return matches(pattern + 1, text) || (*text != '\0' && matches(pattern, text + character(text)));
	if (*text == '\0')
		return false;
	if (*pattern == '?')
		return matches(pattern + 1, text + character(text));
	return *pattern == *text && matches(pattern + 1, text + 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct mailbox box;
	static const char delimiters[] = "/.\\&|^-"; /* its NUL is one of them: no hierarchy */
	char name[MBOX_NAME_MAX + 1], pattern[9], original[MBOX_NAME_MAX + 8], text[NAME_OCTETS];
	struct json entry = { .type = JSON_STRING, .text = pattern };
	struct json list = { .type = JSON_ARRAY, .child = &entry, .count = 1 };
	const char *rest = (const char *)data + 1, *end = (const char *)data + size;
	char delimiter;
	size_t n;

	if (size < 2)
		return 0;
	delimiter = delimiters[*data % sizeof delimiters];
	n = strnlen(rest, (size_t)(end - rest));
	rest += n < (size_t)(end - rest) ? n + 1 : n;
	n = n < MBOX_NAME_MAX ? n : MBOX_NAME_MAX;
	memcpy(name, data + 1, n);
	name[n] = '\0';
	snprintf(pattern, sizeof pattern, "%.*s", (int)(end - rest < 8 ? end - rest : 8), rest);
	for (size_t i = 0, octets; pattern[i] != '\0'; i += octets) /* JSON's strings are UTF-8 */
		if ((octets = utf8_char((const uint8_t *)pattern + i, strlen(pattern + i), NULL)) == 0)
			pattern[i] = '\0', octets = 0;

	check_file(name, delimiter);
	check_decode(name, n);
	memset(original, 'x', sizeof original);
	name_file_original(original, name, delimiter);
	must(memchr(original, '\0', sizeof original) != NULL && strchr(original, '/') == NULL);
	name_text(text, name, delimiter);
	must(memchr(text, '\0', sizeof text) != NULL);
	if (strlen(text) < 24)
		must(match(pattern, text) == matches(pattern, text));
	box = (struct mailbox){ .name = (char *)(uintptr_t)name, .delimiter = delimiter };
	must(!match(pattern, text) || name_matches(&list, &box));
	return 0;
}
