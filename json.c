/*
 * json.c - a JSON parser (RFC 8259), for configurations and the answers of web services
 *
 * It knows the grammar and UTF-8; nothing of files, and nothing of what a value is for. It stands on
 * nothing of ours, so what all three sources need stands here first: errors, wiping, UTF-8.
 *
 * A first pass counts what can become a value or a name, so that the whole tree is one piece of
 * memory, wiped and freed in one go. The second is a recursive descent, JSON_DEPTH_MAX deep.
 *
 * A message shows one character of the text or a member's name, but never a string's value nor a
 * bare word: that may be a password whose quotes were forgotten.
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
	bool full = code == E_SYSTEM && (errno == ENOSPC || errno == EDQUOT);
	const char *reason = strerror(errno);
	bool first = e->code == E_NONE;
	va_list arguments;
	size_t n;

	va_start(arguments, format);
	err_fill(e, full ? E_FULL : code, format, arguments);
	va_end(arguments);
	n = strlen(e->text);
	if (first)
		snprintf(e->text + n, sizeof e->text - n, ": %s", reason);
	return -1;
}

void wipe(void *p, size_t n)
{
	static void *(*const volatile set)(void *, int, size_t) = memset;

	set(p, 0, n);
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

/* ======== JSON ======== */

enum { END = -1 }; /* what peek() sees at the end of the text */

/* A member's name, and where it stands. */
struct name {
	const char *key;
	unsigned line, column;
};

/*
 * What json_parse() returns a part of: the root is node[0]. Behind the nodes is room for the names
 * of the objects that are open at a time, then for the decoded strings: a string loses two quotes
 * and gains one NUL, no escape is shorter than its character, and a number's NUL takes the place of
 * whatever follows it, so all of them together never need more than the text and one octet.
 */
struct tree {
	size_t octets; /* of all this */
	struct json node[];
};

_Static_assert(SIZE_MAX / (sizeof(struct json) + sizeof(struct name) + 2) > JSON_OCTETS_MAX,
	       "the size of a tree does not overflow");

struct parser {
	const char *at, *end; /* the text still to be read */
	const char *line_start;
	unsigned line, depth; /* of 'at' */
	struct json *node;    /* the next free one */
	struct name *name;    /* the next free one; those of outer objects lie below */
	char *string;         /* where the next decoded string goes */
	struct err *e;
};

/* ---- looking, and complaining ---- */

/* The octet at hand, or END. */
static int peek(const struct parser *p)
{
	return p->at < p->end ? (unsigned char)*p->at : END;
}

/* Step over the octet at hand if it is one of 'set'. */
static bool take(struct parser *p, const char *set)
{
	int c = peek(p);

	if (c <= 0 || strchr(set, c) == NULL)
		return false;
	p->at++;
	return true;
}

static unsigned column(const struct parser *p)
{
	return (unsigned)(p->at - p->line_start) + 1;
}

/* The octets of the character at hand, or 0 if the text has no valid one here. */
static size_t char_octets(const struct parser *p, uint32_t *code)
{
	return utf8_char((const uint8_t *)p->at, (size_t)(p->end - p->at), code);
}

static int fail_found(struct parser *p, const char *found, const char *expected)
{
	return err_set(p->e, E_FORMAT, "%u:%u: found %s but expected %s", p->line, column(p), found,
		       expected);
}

/* What is at hand is not what was expected. */
static int fail(struct parser *p, const char *expected)
{
	int c = peek(p);
	uint32_t code;
	char found[32];

	if (c == END)
		return fail_found(p, "the end of the text", expected);
	if (c == '\n' || c == '\r')
		return fail_found(p, "the end of the line", expected);
	if (c == '\'')
		return fail_found(p, "a single quote", expected);
	if (c >= ' ' && c <= '~')
		snprintf(found, sizeof found, "'%c'", c);
	else if (c > 0x7F && char_octets(p, &code) > 0)
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

/* At the 'u' of \uXXXX: read it and the digits. */
static int parse_hex(struct parser *p, uint32_t *unit)
{
	static const char digits[] = "0123456789abcdefABCDEF";

	*unit = 0;
	p->at++;
	for (int i = 0; i < 4; i++) {
		uint32_t digit;

		if (!take(p, digits))
			return fail(p, "four hexadecimal digits after \\u");
		digit = (uint32_t)(strchr(digits, p->at[-1]) - digits);
		*unit = *unit << 4 | (digit < 16 ? digit : digit - 6);
	}
	return 0;
}

/* At the 'u': one sequence, or the two (RFC 8259 section 7) of a character above U+FFFF. */
static int parse_unicode(struct parser *p)
{
	const char *start = p->at - 1;
	uint32_t u, low = 0;
	unsigned n;

	if (parse_hex(p, &u) < 0)
		return -1;
	if (u >= 0xD800 && u <= 0xDBFF && p->end - p->at >= 2 && memcmp(p->at, "\\u", 2) == 0) {
		p->at++;
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
	n = u < 0x80 ? 1 : u < 0x800 ? 2 : u < 0x10000 ? 3 : 4;
	for (unsigned i = n; i-- > 1; u >>= 6)
		p->string[i] = (char)(0x80 | (u & 0x3F));
	p->string[0] = (char)(utf8[n].mark | u);
	p->string += n;
	return 0;
}

/* At the backslash. */
static int parse_escape(struct parser *p)
{
	static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";

	p->at++;
	if (peek(p) == 'u')
		return parse_unicode(p);
	if (!take(p, letters))
		return fail(p, "one of \"\\/bfnrtu after '\\' (a backslash is written \\\\)");
	*p->string++ = meanings[strchr(letters, p->at[-1]) - letters];
	return 0;
}

/* At the opening quote; *text receives the decoded string. */
static int parse_string(struct parser *p, const char **text)
{
	*text = p->string;
	p->at++;
	for (int c = peek(p); c != '"'; c = peek(p)) {
		size_t n;

		if (c == '\\') {
			if (parse_escape(p) < 0)
				return -1;
			continue;
		}
		if (c == END || c == '\n' || c == '\r')
			return fail(p, "'\"' at the end of the string");
		if (c < ' ')
			return fail(p, "an escape sequence such as \\t or \\u0007 in its place");
		n = char_octets(p, NULL);
		if (n == 0)
			return fail(p, "a character in UTF-8");
		memcpy(p->string, p->at, n);
		p->string += n;
		p->at += n;
	}
	p->at++;
	*p->string++ = '\0';
	return 0;
}

/* ---- numbers and words ---- */

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
	const char *start = p->at, *digits;
	char *end;

	take(p, "-");
	digits = p->at;
	if (skip_digits(p) < 0)
		return -1;
	if (*digits == '0' && p->at > digits + 1) {
		p->at = digits;
		return fail(p, "a number without leading zeros");
	}
	if (take(p, ".") && skip_digits(p) < 0)
		return -1;
	if (take(p, "eE")) {
		take(p, "+-");
		if (skip_digits(p) < 0)
			return -1;
	}
	v->type = JSON_NUMBER;
	v->text = memcpy(p->string, start, (size_t)(p->at - start));
	p->string += p->at - start;
	*p->string++ = '\0';
	errno = 0;
	v->number = strtoll(v->text, &end, 10);
	v->integral = errno == 0 && *end == '\0';
	if (!v->integral)
		v->number = 0;
	return 0;
}

static int parse_word(struct parser *p, struct json *v)
{
	static const char *const words[] = { "null", "false", "true" };
	int c = peek(p);

	for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
		size_t n = strlen(words[i]);

		if ((size_t)(p->end - p->at) >= n && memcmp(p->at, words[i], n) == 0) {
			p->at += n;
			v->type = c == 'n' ? JSON_NULL : JSON_BOOL;
			v->number = c == 't';
			return 0;
		}
	}
	if ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'))
		return fail_found(p, "a word without quotes", "a value");
	return fail(p, "a value");
}

/* ---- arrays and objects ---- */

/* A member's name and the colon behind it. */
static int parse_name(struct parser *p, const char **key)
{
	struct name *name = p->name++;

	name->line = p->line;
	name->column = column(p);
	if (peek(p) != '"')
		return fail(p, "a name in double quotes");
	if (parse_string(p, key) < 0)
		return -1;
	name->key = *key;
	skip_space(p);
	if (!take(p, ":"))
		return fail(p, "':' after the name");
	skip_space(p);
	return 0;
}

/* By name; equal ones as in the text, which is also the order of the decoded strings. */
static int compare_names(const void *a, const void *b)
{
	const struct name *x = a, *y = b;
	int order = strcmp(x->key, y->key);

	return order != 0 ? order : (x->key > y->key) - (x->key < y->key);
}

/* No two alike? Found by sorting: what a server sends may have half a million of them. */
static int check_names(struct parser *p, struct name *first)
{
	char shown[40];
	size_t n = 0;

	qsort(first, (size_t)(p->name - first), sizeof *first, compare_names);
	while (first + 1 < p->name && strcmp(first[0].key, first[1].key) != 0)
		first++;
	if (first + 1 >= p->name)
		return 0;
	for (const char *s = first->key; *s != '\0' && n + 1 < sizeof shown; s++)
		shown[n++] = *s >= ' ' && *s <= '~' ? *s : '?';
	shown[n] = '\0';
	return err_set(p->e, E_FORMAT,
		       "%u:%u: found the name \"%s\" again but expected it once: "
		       "it is already at %u:%u",
		       first[1].line, first[1].column, shown, first[0].line, first[0].column);
}

static int parse_value(struct parser *p, struct json *v);

/* At the opening bracket. */
static int parse_children(struct parser *p, struct json *v)
{
	bool object = v->type == JSON_OBJECT;
	const char *close = object ? "}" : "]";
	const struct json **link = &v->child;
	struct name *first_name = p->name;

	if (p->depth++ == JSON_DEPTH_MAX)
		return fail(p, "no more arrays and objects inside each other");
	p->at++;
	skip_space(p);
	if (peek(p) != *close) {
		do {
			struct json *child = p->node++;

			skip_space(p);
			if (v->count > 0 && peek(p) == *close)
				return fail(p, "no trailing comma in front of it");
			if (object && parse_name(p, &child->key) < 0)
				return -1;
			if (parse_value(p, child) < 0)
				return -1;
			*link = child;
			link = &child->next;
			v->count++;
			skip_space(p);
		} while (take(p, ","));
	}
	if (!take(p, close))
		return fail(p, object ? "',' or '}'" : "',' or ']'");
	if (check_names(p, first_name) < 0)
		return -1;
	p->name = first_name;
	p->depth--;
	return 0;
}

static int parse_value(struct parser *p, struct json *v)
{
	int c = peek(p);

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
	return parse_word(p, v);
}

/* ---- see imap_backup.h ---- */

struct json *json_parse(const char *text, size_t length, struct err *e)
{
	struct parser p = { .at = text, .end = text + length, .line = 1, .e = e };
	size_t nodes = 1, names = 1, octets; /* one name more: it may lack its colon */
	bool in_string = false;
	struct tree *tree;
	int result;

	if (length > JSON_OCTETS_MAX) {
		err_set(e, E_FORMAT, "1:1: found %zu octets but expected no more than %d", length,
			(int)JSON_OCTETS_MAX);
		return NULL;
	}
	if (length >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0)
		p.at += 3;
	p.line_start = p.at;
	for (const char *s = p.at; s < p.end; s++) {
		if (*s == '"')
			in_string = !in_string;
		else if (in_string)
			s += *s == '\\';
		else if (*s == ':')
			names++;
		else
			nodes += *s == '[' || *s == '{' || *s == ','; /* a value may follow */
	}
	octets = sizeof *tree + nodes * sizeof *p.node + names * sizeof *p.name + length + 1;
	tree = calloc(1, octets);
	if (tree == NULL) {
		err_set(e, E_SYSTEM, "out of memory for JSON of %zu octets", length);
		return NULL;
	}
	tree->octets = octets;
	p.node = tree->node + 1;
	p.name = (void *)(tree->node + nodes);
	p.string = (void *)(p.name + names);

	skip_space(&p);
	result = parse_value(&p, tree->node);
	assert(p.node <= tree->node + nodes && p.string <= (char *)tree + octets);
	skip_space(&p);
	if (result == 0 && p.at < p.end)
		result = fail(&p, "the end of the text");
	if (result < 0) {
		json_free(tree->node);
		return NULL;
	}
	return tree->node;
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
	for (; text < end; text += octets > 0 ? octets : 1) {
		char escaped[8];
		const char *from = text;
		size_t length;

		octets = utf8_char((const uint8_t *)text, (size_t)(end - text), NULL);
		length = octets;
		if (octets == 0 || (unsigned char)*text < 0x20 || *text == 0x7F) {
			from = escaped;
			length = (size_t)snprintf(escaped, sizeof escaped, "\\u%04x",
						  octets == 0 ? 0xFFFD : (unsigned)*text);
		} else if (*text == '"' || *text == '\\') {
			from = escaped;
			length = (size_t)snprintf(escaped, sizeof escaped, "\\%c", *text);
		}
		if (n + length + 2 > size) /* the closing quote and NUL */
			break;
		memcpy(out + n, from, length);
		n += length;
	}
	out[n++] = '"';
	out[n] = '\0';
	return text < end ? 0 : n;
}
