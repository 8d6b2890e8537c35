/*
 * json.c - a JSON parser (RFC 8259), for configurations and the answers of web services
 *
 * It knows the grammar and UTF-8; nothing of files, and nothing of what a value is for. It stands on
 * nothing of ours, so what the other sources need, too, stands here first: errors, wiping, folders, UTF-8,
 * clock, calendar.
 *
 * A first pass counts what can become a value or a name, so that the whole tree is one piece of
 * memory, wiped and freed in one go. The second is a recursive descent, JSON_DEPTH_MAX deep.
 *
 * A message shows one character of the text, but never a name, a string's value nor a bare word: that
 * may be a password whose quotes were forgotten.
 */
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#include "imap_backup.h"

/* ======== for all ======== */

int err_fill(struct err *e, enum err_code code, const char *format, va_list arguments)
{
	if (e->code == E_NONE) {
		e->code = code;
		vsnprintf(e->text, sizeof e->text, format, arguments);
	}
	return -1;
}

int err_set(struct err *e, enum err_code code, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	err_fill(e, code, format, arguments);
	va_end(arguments);
	return -1;
}

int err_errno(struct err *e, enum err_code code, const char *format, ...)
{
	int reason = errno;
	bool full = code == E_SYSTEM && (reason == ENOSPC || reason == EDQUOT);
	va_list arguments;
	size_t n;

	if (e->code != E_NONE)
		return -1;
	va_start(arguments, format);
	err_fill(e, full ? E_FULL : code, format, arguments);
	va_end(arguments);
	n = strlen(e->text);
	snprintf(e->text + n, sizeof e->text - n, ": %s", strerror(reason));
	return -1;
}

void wipe(void *p, size_t n)
{
	static void *(*const volatile set)(void *, int, size_t) = memset;

	set(p, 0, n);
}

bool random_octets(void *out, size_t n)
{
	int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	bool done = fd >= 0 && read(fd, out, n) == (ssize_t)n;

	if (fd >= 0)
		close(fd);
	return done;
}

int folder_sync(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), r;

	/* EINVAL: a file system (CIFS, FUSE) that does not sync folders does so by itself or never. */
	r = fd < 0 || (fsync(fd) != 0 && errno != EINVAL) ? -1 : 0;
	if (fd >= 0)
		close(fd);
	return r;
}

/* UTF-8 by a character's length: the bits that mark its first octet, the least code. */
static const struct {
	uint32_t mark, least;
} utf8[] = {
	{ 0, 0 }, { 0, 0 }, { 0xC0, 0x80 }, { 0xE0, 0x800 }, { 0xF0, 0x10000 },
};

size_t utf8_char(const uint8_t *p, size_t n, uint32_t *code)
{
	size_t octets = *p < 0x80 ? 1 : *p < 0xC0 ? 0 : *p < 0xE0 ? 2 : *p < 0xF0 ? 3 : 4;
	uint32_t u = *p - utf8[octets].mark;

	if (octets == 0 || n < octets)
		return 0;
	for (size_t i = 1; i < octets; i++) {
		if ((p[i] & 0xC0) != 0x80)
			return 0;
		u = u << 6 | (p[i] & 0x3F);
	}
	if (u < utf8[octets].least || u > 0x10FFFF || (u >= 0xD800 && u <= 0xDFFF))
		return 0;
	if (code != NULL)
		*code = u;
	return octets;
}

size_t utf8_put(char *out, uint32_t code)
{
	size_t octets = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;

	for (size_t i = octets; i-- > 1; code >>= 6)
		out[i] = (char)(0x80 | (code & 0x3F));
	out[0] = (char)(utf8[octets].mark | code);
	return octets;
}

int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int64_t days_of(int64_t year, unsigned month, unsigned day)
{
	int64_t y = year - (month <= 2), era = (y >= 0 ? y : y - 399) / 400, of_era = y - era * 400;

	return era * 146097 + of_era * 365 + of_era / 4 - of_era / 100 +
	       (153 * ((month + 9) % 12) + 2) / 5 + day - 1 - 719468;
}

const char month_names[] = "JanFebMarAprMayJunJulAugSepOctNovDec";

unsigned month_of(const char *text)
{
	for (unsigned m = 0; m < 12; m++)
		if (strncasecmp(month_names + 3 * m, text, 3) == 0)
			return m + 1;
	return 0;
}

/* ======== JSON ======== */

/*
 * What json_parse() returns a part of: the root is node[0]. Behind the nodes is a copy of the text, closed
 * with NUL, in which strings and numbers are decoded where they stand: a string loses two quotes and gains
 * one NUL, no escape is shorter than its character, and a number, which wants a NUL behind it, moves to the
 * octet in front of it, which has been read.
 */
struct tree {
	size_t octets; /* of all this */
	struct json node[];
};

_Static_assert(SIZE_MAX / (sizeof(struct json) + 2) > JSON_OCTETS_MAX, "the size does not overflow");

struct parser {
	char *at, *end; /* the text still to be read; *end is NUL */
	char *line_start;
	unsigned line, depth; /* of 'at' */
	struct json *node;    /* the next free one */
	struct err *e;
};

/* ---- looking, and complaining ---- */

/* Step over the octet at hand if it is one of 'set'. */
static bool take(struct parser *p, const char *set)
{
	if (*p->at == '\0' || strchr(set, *p->at) == NULL)
		return false;
	p->at++;
	return true;
}

static unsigned column(const struct parser *p)
{
	return (unsigned)(p->at - p->line_start) + 1;
}

static int fail_found(struct parser *p, const char *found, const char *expected)
{
	return err_set(p->e, E_FORMAT, "%u:%u: found %s but expected %s", p->line, column(p), found,
		       expected);
}

/* What is at hand is not what was expected. */
static int fail(struct parser *p, const char *expected)
{
	int c = (unsigned char)*p->at;
	uint32_t code;
	char found[32];

	if (p->at == p->end)
		return fail_found(p, "the end of the text", expected);
	if (c == '\n' || c == '\r')
		return fail_found(p, "the end of the line", expected);
	if (c >= ' ' && c <= '~')
		snprintf(found, sizeof found, "'%c'", c);
	else if (c > 0x7F && utf8_char((const uint8_t *)p->at, (size_t)(p->end - p->at), &code) > 0)
		snprintf(found, sizeof found, "the character U+%04lX", (unsigned long)code);
	else
		snprintf(found, sizeof found, "octet 0x%02x", (unsigned)c);
	return fail_found(p, found, expected);
}

/* The only place where a line may end. */
static void skip_space(struct parser *p)
{
	while (take(p, " \t\r\n")) {
		if (p->at[-1] == '\n') {
			p->line++;
			p->line_start = p->at;
		}
	}
}

/* ---- strings ---- */

/* Read the digits of \uXXXX. */
static int parse_hex(struct parser *p, uint32_t *unit)
{
	char digits[5] = "";

	for (int i = 0; i < 4; i++) {
		if (!isxdigit((unsigned char)*p->at))
			return fail(p, "four hexadecimal digits after \\u");
		digits[i] = *p->at++;
	}
	*unit = (uint32_t)strtoul(digits, NULL, 16);
	return 0;
}

/* At the backslash: write at *to what it stands for; two \uXXXX (RFC 8259 section 7) are one above U+FFFF. */
static int parse_escape(struct parser *p, char **to)
{
	static const char letters[] = "u\"\\/bfnrt", meanings[] = "u\"\\/\b\f\n\r\t";
	char *start = p->at++;
	uint32_t u, low;

	if (!take(p, letters))
		return fail(p, "one of \"\\/bfnrtu after '\\' (a backslash is written \\\\)");
	if (p->at[-1] != 'u') {
		*(*to)++ = meanings[strchr(letters, p->at[-1]) - letters];
		return 0;
	}
	if (parse_hex(p, &u) < 0)
		return -1;
	if (u >= 0xD800 && u <= 0xDBFF && strncmp(p->at, "\\u", 2) == 0) {
		p->at += 2;
		if (parse_hex(p, &low) < 0)
			return -1;
		if (low >= 0xDC00 && low <= 0xDFFF)
			u = 0x10000 + ((u - 0xD800) << 10) + (low - 0xDC00);
	}
	if (u == 0 || (u >= 0xD800 && u <= 0xDFFF)) {
		p->at = start;
		return u == 0 ? fail_found(p, "\\u0000", "a character that can stand in text")
			      : fail_found(p, "half a surrogate pair", "both, as \\uD83D\\uDE00");
	}
	*to += utf8_put(*to, u);
	return 0;
}

/* At the opening quote; *text receives the decoded string. */
static int parse_string(struct parser *p, const char **text)
{
	char *to = ++p->at;

	*text = to;
	while (*p->at != '"') {
		size_t n;

		if (*p->at == '\\') {
			if (parse_escape(p, &to) < 0)
				return -1;
			continue;
		}
		if (p->at == p->end || *p->at == '\n' || *p->at == '\r')
			return fail(p, "'\"' at the end of the string");
		if ((unsigned char)*p->at < ' ')
			return fail(p, "an escape sequence such as \\t or \\u0007 in its place");
		n = utf8_char((const uint8_t *)p->at, (size_t)(p->end - p->at), NULL);
		if (n == 0)
			return fail(p, "a character in UTF-8");
		memmove(to, p->at, n);
		to += n;
		p->at += n;
	}
	p->at++;
	*to = '\0';
	return 0;
}

/* ---- numbers ---- */

static int skip_digits(struct parser *p)
{
	if (!take(p, "0123456789"))
		return fail(p, "a digit");
	while (take(p, "0123456789"))
		;
	return 0;
}

static int parse_number(struct parser *p, struct json *v)
{
	char *start = p->at;
	long long number;
	char *end;

	take(p, "-");
	if ((!take(p, "0") && skip_digits(p) < 0) || (take(p, ".") && skip_digits(p) < 0))
		return -1;
	if (take(p, "eE")) {
		take(p, "+-");
		if (skip_digits(p) < 0)
			return -1;
	}
	v->type = JSON_NUMBER;
	v->text = memmove(start - 1, start, (size_t)(p->at - start));
	p->at[-1] = '\0';
	errno = 0;
	number = strtoll(v->text, &end, 10);
	v->integral = errno == 0 && *end == '\0';
	v->number = v->integral ? number : 0;
	return 0;
}

/* ---- arrays and objects ---- */

/* The name of a new member of an object, and the colon behind it. */
static int parse_name(struct parser *p, const struct json *object, struct json *member)
{
	char *start = p->at;
	const struct json *other;
	char expected[80];

	if (*p->at != '"')
		return fail(p, "a name in double quotes");
	if (parse_string(p, &member->key) < 0)
		return -1;
	other = json_get(object, member->key);
	if (other != NULL || object->count == JSON_MEMBERS_MAX) {
		p->at = start;
		if (other == NULL)
			return fail(p, "fewer members in one object");
		snprintf(expected, sizeof expected, "it once: its value is already at %u:%u", other->line,
			 other->column);
		return fail_found(p, "this name again", expected);
	}
	skip_space(p);
	if (!take(p, ":"))
		return fail(p, "':' after the name");
	skip_space(p);
	return 0;
}

static int parse_value(struct parser *p, struct json *v);

/* At the opening bracket. */
static int parse_children(struct parser *p, struct json *v)
{
	const char *close = v->type == JSON_OBJECT ? "}" : "]";
	const struct json **link = &v->child;

	if (p->depth++ == JSON_DEPTH_MAX)
		return fail(p, "no more arrays and objects inside each other");
	p->at++;
	skip_space(p);
	while (v->count > 0 ? take(p, ",") : *p->at != *close) {
		struct json *child = p->node++;

		skip_space(p);
		if (v->count > 0 && *p->at == *close)
			return fail(p, "no trailing comma in front of it");
		if ((*close == '}' && parse_name(p, v, child) < 0) || parse_value(p, child) < 0)
			return -1;
		*link = child;
		link = &child->next;
		v->count++;
		skip_space(p);
	}
	if (!take(p, close))
		return fail(p, *close == '}' ? "',' or '}'" : "',' or ']'");
	p->depth--;
	return 0;
}

static int parse_value(struct parser *p, struct json *v)
{
	static const char *const words[] = { "null", "false", "true" };
	char c = *p->at;

	v->line = p->line;
	v->column = column(p);
	if (c == '{' || c == '[') {
		v->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
		return parse_children(p, v);
	}
	if (c == '"') {
		v->type = JSON_STRING;
		return parse_string(p, &v->text);
	}
	if (c == '-' || (c >= '0' && c <= '9'))
		return parse_number(p, v);
	for (int i = 0; i < 3; i++) {
		if (strncmp(p->at, words[i], strlen(words[i])) == 0) {
			p->at += strlen(words[i]);
			v->type = i == 0 ? JSON_NULL : JSON_BOOL;
			v->number = i == 2;
			return 0;
		}
	}
	if (isalpha((unsigned char)c))
		return fail_found(p, "a word without quotes", "a value");
	return fail(p, "a value");
}

/* ---- see imap_backup.h ---- */

struct json *json_parse(const char *text, size_t length, struct err *e)
{
	struct parser p = { .line = 1, .e = e };
	size_t nodes = 1, octets;
	bool in_string = false;
	struct tree *tree;

	if (length > JSON_OCTETS_MAX) {
		err_set(e, E_FORMAT, "1:1: found %zu octets but expected no more than %d", length,
			(int)JSON_OCTETS_MAX);
		return NULL;
	}
	for (size_t i = 0; i < length; i++) {
		if (text[i] == '"')
			in_string = !in_string;
		else if (in_string)
			i += text[i] == '\\';
		else
			nodes += text[i] == '[' || text[i] == '{' ||
				 text[i] == ','; /* a value may follow */
	}
	octets = sizeof *tree + nodes * sizeof *p.node + length + 2;
	tree = calloc(1, octets);
	if (tree == NULL) {
		err_set(e, E_SYSTEM, "out of memory for JSON of %zu octets", length);
		return NULL;
	}
	tree->octets = octets;
	p.node = tree->node + 1;
	p.at = (char *)(tree->node + nodes) + 1;
	p.end = p.at + length;
	memcpy(p.at, text, length);
	if (strncmp(p.at, "\xEF\xBB\xBF", 3) == 0)
		p.at += 3;
	p.line_start = p.at;

	skip_space(&p);
	if (parse_value(&p, tree->node) == 0) {
		skip_space(&p);
		if (p.at < p.end)
			fail(&p, "the end of the text");
	}
	assert(p.node <= tree->node + nodes);
	if (e->code == E_NONE)
		return tree->node;
	json_free(tree->node);
	return NULL;
}

void json_free(struct json *root)
{
	struct tree *tree;

	if (root == NULL)
		return;
	tree = (void *)((char *)root - offsetof(struct tree, node));
	wipe(tree, tree->octets);
	free(tree);
}

const struct json *json_get(const struct json *object, const char *key)
{
	if (object->type != JSON_OBJECT)
		return NULL;
	for (const struct json *v = object->child; v != NULL; v = v->next)
		if (strcmp(v->key, key) == 0)
			return v;
	return NULL;
}

const char *json_type_name(enum json_type type)
{
	static const char *const names[] = { "null",     "true or false", "a number",
					     "a string", "an array",      "an object" };

	return names[type];
}

size_t json_escape(char *out, size_t size, const char *text)
{
	const char *end = text + strlen(text);
	size_t n = 1, octets;

	out[0] = '"';
	for (; text < end; text += (octets > 0 ? octets : 1)) {
		char escaped[8];
		size_t length;

		octets = utf8_char((const uint8_t *)text, (size_t)(end - text), NULL);
		if (octets == 0 || (unsigned char)*text < 0x20 || *text == 0x7F)
			length = (size_t)snprintf(escaped, sizeof escaped, "\\u%04x",
						  octets == 0 ? 0xFFFD : (unsigned)*text);
		else
			length = (size_t)snprintf(escaped, sizeof escaped, "%s%.*s",
						  *text == '"' || *text == '\\' ? "\\" : "", (int)octets,
						  text);
		if (n + length + 2 > size) /* the closing quote and NUL */
			break;
		memcpy(out + n, escaped, length);
		n += length;
	}
	out[n++] = '"';
	out[n] = '\0';
	return text < end ? 0 : n;
}
