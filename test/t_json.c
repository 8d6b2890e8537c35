/*
 * t_json - unit tests of json.c
 *
 * Prints what failed and one summary line; exits 0 if nothing did.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "unit.h"

#define N(table) (sizeof (table) / sizeof *(table))

/* ---- helpers ---- */

static void *need(void *p)
{
	if (p == NULL) {
		printf("t_json: out of memory\n");
		exit(1);
	}
	return p;
}

/* Parse a copy that ends where the text ends, and is gone when the tree is looked at. */
static struct json *parse(const char *text, size_t n, struct err *e)
{
	char *copy = need(malloc(n > 0 ? n : 1));
	struct json *root;

	*e = (struct err){ .code = E_NONE };
	memcpy(copy, text, n);
	root = json_parse(copy, n, e);
	memset(copy, 'x', n);
	free(copy);
	return root;
}

/* A growing text. */
struct text {
	char *s;
	size_t n, size;
};

static void put(struct text *t, const char *s, size_t n)
{
	if (n >= t->size - t->n) {
		t->size = (t->size + n + 1) * 2;
		t->s = need(realloc(t->s, t->size));
	}
	memcpy(t->s + t->n, s, n);
	t->n += n;
	t->s[t->n] = '\0';
}

static void puts_n(struct text *t, const char *s, size_t times)
{
	while (times-- > 0)
		put(t, s, strlen(s));
}

/* The tree as one line: 1 -> i1, 1.5 -> f1.5, strings in quotes with other than ASCII as <hex>. */
static void dump_string(struct text *t, const char *s)
{
	put(t, "\"", 1);
	for (; *s != '\0'; s++) {
		char hex[8];

		if (*s >= ' ' && *s <= '~') {
			put(t, s, 1);
			continue;
		}
		snprintf(hex, sizeof hex, "<%02x>", (unsigned)(unsigned char)*s);
		put(t, hex, 4);
	}
	put(t, "\"", 1);
}

static void dump(struct text *t, const struct json *v)
{
	char number[32];

	switch (v->type) {
	case JSON_NULL:
		puts_n(t, "null", 1);
		break;
	case JSON_BOOL:
		puts_n(t, v->number == 1 ? "true" : v->number == 0 ? "false" : "?", 1);
		break;
	case JSON_NUMBER:
		snprintf(number, sizeof number, "i%" PRId64, v->number);
		if (v->integral) {
			puts_n(t, number, 1);
		} else {
			puts_n(t, v->number == 0 ? "f" : "?", 1);
			puts_n(t, v->text, 1);
		}
		break;
	case JSON_STRING:
		dump_string(t, v->text);
		break;
	case JSON_ARRAY:
	case JSON_OBJECT:
		put(t, v->type == JSON_ARRAY ? "[" : "{", 1);
		for (const struct json *w = v->child; w != NULL; w = w->next) {
			if (w->key != NULL) {
				dump_string(t, w->key);
				put(t, ":", 1);
			}
			dump(t, w);
			if (w->next != NULL)
				put(t, ",", 1);
		}
		put(t, v->type == JSON_ARRAY ? "]" : "}", 1);
		break;
	}
}

/* The offset of LINE:COLUMN in a text, or SIZE_MAX if it has no such place. */
static size_t offset_of(const char *text, size_t n, unsigned line, unsigned column)
{
	size_t at = n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;

	if (line == 0 || column == 0)
		return SIZE_MAX;
	while (--line > 0) {
		const char *end = memchr(text + at, '\n', n - at);

		if (end == NULL)
			return SIZE_MAX;
		at = (size_t)(end - text) + 1;
	}
	return column - 1 <= n - at ? at + column - 1 : SIZE_MAX;
}

/* What holds for every tree of every text. */
static bool sound(const char *text, size_t n, const struct json *v, const struct json *parent)
{
	static const char *const first[] = { "n", "tf", "-0123456789", "\"", "[", "{" };
	bool has_text = v->type == JSON_STRING || v->type == JSON_NUMBER;
	bool has_children = v->type == JSON_ARRAY || v->type == JSON_OBJECT;
	size_t at = offset_of(text, n, v->line, v->column);
	uint32_t count = 0;

	if (at >= n || text[at] == '\0' || strchr(first[v->type], text[at]) == NULL)
		return check(false, "type %d is wrong at %u:%u", (int)v->type, v->line, v->column);
	if ((v->text != NULL) != has_text || (v->child != NULL) != (v->count > 0) ||
	    (v->count > 0 && !has_children) || (v->integral && v->type != JSON_NUMBER) ||
	    (v->type == JSON_BOOL && v->number != (text[at] == 't')) ||
	    (v->type == JSON_NUMBER && strncmp(v->text, text + at, strlen(v->text)) != 0) ||
	    (v->key != NULL) != (parent != NULL && parent->type == JSON_OBJECT))
		return check(false, "the fields do not fit at %u:%u", v->line, v->column);
	for (const struct json *w = v->child; w != NULL; w = w->next, count++) {
		if (v->type == JSON_OBJECT && count < 100 && json_get(v, w->key) != w)
			return check(false, "json_get \"%s\" finds another one", w->key);
		if (!sound(text, n, w, v))
			return false;
	}
	return check(count == v->count, "%u children at %u:%u, count %u", (unsigned)count, v->line,
	             v->column, (unsigned)v->count);
}

/* What holds for every refusal: LINE:COLUMN in the text, printable, one line, and no secret. */
static bool refused_well(const char *text, size_t n, const struct err *e)
{
	unsigned line = 0, column = 0;
	int end = 0;
	const char *said = e->text;
	bool ok = check(e->code == E_FORMAT, "code %d for: %.60s", (int)e->code, text);

	if (sscanf(said, "%u:%u: found %n", &line, &column, &end) < 2 || end == 0)
		return check(false, "no place in \"%s\"", said);
	ok &= check(offset_of(text, n, line, column) <= n, "a place outside in \"%s\"", said);
	ok &= check(strstr(said, " but expected ") != NULL, "nothing expected in \"%s\"", said);
	ok &= check(strstr(said, "hunter2") == NULL, "a secret in \"%s\"", said);
	for (const char *s = said; *s != '\0'; s++)
		ok &= check(*s >= ' ' && *s <= '~', "octet %d in \"%s\"", *s, said);
	return ok;
}

/* Whatever it is, it must be sound or refused well. Returns whether it was accepted. */
static bool either(const char *text, size_t n)
{
	struct err e;
	struct json *root = parse(text, n, &e);
	bool accepted = root != NULL;

	if (accepted)
		sound(text, n, root, NULL);
	else
		refused_well(text, n, &e);
	json_free(root);
	return accepted;
}

/* ---- texts that are valid ---- */

#define T(literal) literal, sizeof literal - 1

static const struct {
	const char *text;
	size_t n;
	const char *dump;
} valid[] = {
	{ T("null"), "null" },
	{ T("true"), "true" },
	{ T("false"), "false" },
	{ T(" \t\r\n[ \t\r\n] \t\r\n"), "[]" },
	{ T("{}"), "{}" },
	{ T("{ }"), "{}" },
	{ T("[[],{},[[]]]"), "[[],{},[[]]]" },
	{ T("[null,true,false,\"\",0]"), "[null,true,false,\"\",i0]" },
	{ T("{\"a\":1,\"b\":[2,{\"a\":3}],\"\":{}}"), "{\"a\":i1,\"b\":[i2,{\"a\":i3}],\"\":{}}" },
	{ T("{ \"a\" : 1 , \"b\" : 2 }"), "{\"a\":i1,\"b\":i2}" },
	{ T("[{\"a\":1},{\"a\":1}]"), "[{\"a\":i1},{\"a\":i1}]" },
	{ T("{\"a\":{\"a\":{\"a\":1}}}"), "{\"a\":{\"a\":{\"a\":i1}}}" },
	{ T("{\"a\":0,\"A\":0,\"aa\":0,\"a \":0}"), "{\"a\":i0,\"A\":i0,\"aa\":i0,\"a \":i0}" },
	{ T("{\"z\":{\"b\":0},\"y\":{\"b\":0},\"b\":0,\"x\":0}"),
	  "{\"z\":{\"b\":i0},\"y\":{\"b\":i0},\"b\":i0,\"x\":i0}" },
	/* a byte order mark */
	{ T("\xEF\xBB\xBF{\"a\":1}"), "{\"a\":i1}" },
	{ T("\xEF\xBB\xBF\n 1"), "i1" },
	/* numbers */
	{ T("0"), "i0" },
	{ T("-0"), "i0" },
	{ T("7"), "i7" },
	{ T("-7"), "i-7" },
	{ T("10"), "i10" },
	{ T("1234567890"), "i1234567890" },
	{ T("4294967296"), "i4294967296" },
	{ T("9223372036854775806"), "i9223372036854775806" },
	{ T("9223372036854775807"), "i9223372036854775807" },
	{ T("9223372036854775808"), "f9223372036854775808" },
	{ T("9223372036854775810"), "f9223372036854775810" },
	{ T("92233720368547758070"), "f92233720368547758070" },
	{ T("-9223372036854775807"), "i-9223372036854775807" },
	{ T("-9223372036854775808"), "i-9223372036854775808" },
	{ T("-9223372036854775809"), "f-9223372036854775809" },
	{ T("-92233720368547758080"), "f-92233720368547758080" },
	{ T("18446744073709551616"), "f18446744073709551616" },
	{ T("18446744073709551617"), "f18446744073709551617" },
	{ T("0.0"), "f0.0" },
	{ T("-0.0"), "f-0.0" },
	{ T("1.5"), "f1.5" },
	{ T("1.0"), "f1.0" },
	{ T("0.00100"), "f0.00100" },
	{ T("1e0"), "f1e0" },
	{ T("0e00"), "f0e00" },
	{ T("1E+2"), "f1E+2" },
	{ T("-1.25e-02"), "f-1.25e-02" },
	{ T("1e999999999999999999999"), "f1e999999999999999999999" },
	{ T("[1,-2,3.0,4]"), "[i1,i-2,f3.0,i4]" },
	/* strings */
	{ T("\"\""), "\"\"" },
	{ T("\"a b\""), "\"a b\"" },
	{ T("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\""), "\"\"\\/<08><0c><0a><0d><09>\"" },
	{ T("\"\\\\\""), "\"\\\"" },
	{ T("\"\\\\\\\\\""), "\"\\\\\"" },
	{ T("\"\\\\\\\"\""), "\"\\\"\"" },
	{ T("[\"\\\\\",\"[{:,\",\"\\\",\"]"), "[\"\\\",\"[{:,\",\"\",\"]" },
	{ T("{\"[{:,\\\"\":\"]}:,\"}"), "{\"[{:,\"\":\"]}:,\"}" },
	{ T("\"/\x7F'\""), "\"/<7f>'\"" },
	{ T("\"\\u0041\\u00e9\\u20AC\\u20ac\""), "\"A<c3><a9><e2><82><ac><e2><82><ac>\"" },
	{ T("\"\\u0001\\u001f\\u007f\\u0080\""), "\"<01><1f><7f><c2><80>\"" },
	{ T("\"\\u07ff\\u0800\\uffff\""), "\"<df><bf><e0><a0><80><ef><bf><bf>\"" },
	{ T("\"\\ud7ff\\ue000\""), "\"<ed><9f><bf><ee><80><80>\"" },
	{ T("\"\\ud800\\udc00\\uDBFF\\uDFFF\""), "\"<f0><90><80><80><f4><8f><bf><bf>\"" },
	{ T("\"\\ud83d\\ude00x\""), "\"<f0><9f><98><80>x\"" },
	{ T("\"\\u00410\""), "\"A0\"" },
	{ T("\"\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80\""),
	  "\"<c3><a4><e2><82><ac><f0><9f><98><80>\"" },
	{ T("\"\xEF\xBB\xBF\""), "\"<ef><bb><bf>\"" },
	{ T("{\"\\u0061\\n\":\"b\"}"), "{\"a<0a>\":\"b\"}" },
};

static void test_valid(void)
{
	for (size_t i = 0; i < sizeof valid / sizeof valid[0]; i++) {
		struct text t = { NULL, 0, 0 };
		struct err e;
		struct json *root = parse(valid[i].text, valid[i].n, &e);

		if (check(root != NULL, "refused %s: %s", valid[i].text, e.text)) {
			check(e.code == E_NONE, "an error is set for %s", valid[i].text);
			sound(valid[i].text, valid[i].n, root, NULL);
			dump(&t, root);
			check(strcmp(t.s, valid[i].dump) == 0, "%s is %s", valid[i].text, t.s);
			check(root->next == NULL && root->key == NULL, "a root with relatives");
		}
		json_free(root);
		free(t.s);
	}
}

/* ---- texts that are not ---- */

static const struct {
	const char *text;
	size_t n;
	const char *place, *found, *expected;
} invalid[] = {
	/* no value, or more than one */
	{ T(""), "1:1: ", "the end of the text", "a value" },
	{ T(" \n\n  "), "3:3: ", "the end of the text", "a value" },
	{ T("\xEF\xBB\xBF"), "1:1: ", "the end of the text", "a value" },
	{ T("\xEF\xBB"), "1:1: ", "octet 0xef", "a value" },
	{ T("\xEF\xBB\xBF\xEF\xBB\xBF" "1"), "1:1: ", "the character U+FEFF", "a value" },
	{ T(" \xEF\xBB\xBF" "1"), "1:2: ", "the character U+FEFF", "a value" },
	{ T("\xFF\xFE{\0}\0"), "1:1: ", "octet 0xff", "a value" },
	{ T("1 2"), "1:3: ", "'2'", "the end of the text" },
	{ T("{}\n}"), "2:1: ", "'}'", "the end of the text" },
	{ T("[],"), "1:3: ", "','", "the end of the text" },
	{ T("null\0"), "1:5: ", "octet 0x00", "the end of the text" },
	{ T("\0"), "1:1: ", "octet 0x00", "a value" },
	{ T("nullx"), "1:5: ", "'x'", "the end of the text" },
	{ T("{} // end"), "1:4: ", "'/'", "the end of the text" },
	/* what is no value */
	{ T("[\x07]"), "1:2: ", "octet 0x07", "a value" },
	{ T("[\x7F]"), "1:2: ", "octet 0x7f", "a value" },
	{ T("[\x0B]"), "1:2: ", "octet 0x0b", "a value" },
	{ T("[\x0C]"), "1:2: ", "octet 0x0c", "a value" },
	{ T("[\xC2\xA0" "1]"), "1:2: ", "the character U+00A0", "a value" },
	{ T("[\xE2\x80\x9Cx\xE2\x80\x9D]"), "1:2: ", "the character U+201C", "a value" },
	{ T("[\xF0\x9F\x98\x80]"), "1:2: ", "the character U+1F600", "a value" },
	{ T("[\xE2\x80"), "1:2: ", "octet 0xe2", "a value" },
	{ T("['a']"), "1:2: ", "'''", "a value" },
	{ T("nul"), "1:1: ", "a word without quotes", "a value" },
	{ T("tru"), "1:1: ", "a word without quotes", "a value" },
	{ T("fals"), "1:1: ", "a word without quotes", "a value" },
	{ T("[True]"), "1:2: ", "a word without quotes", "a value" },
	{ T("[NaN]"), "1:2: ", "a word without quotes", "a value" },
	{ T("[zebra]"), "1:2: ", "a word without quotes", "a value" },
	{ T("{\"a\": hunter2}"), "1:7: ", "a word without quotes", "a value" },
	{ T("/* */ 1"), "1:1: ", "'/'", "a value" },
	{ T("# 1"), "1:1: ", "'#'", "a value" },
	/* arrays */
	{ T("["), "1:2: ", "the end of the text", "a value" },
	{ T("[ \n"), "2:1: ", "the end of the text", "a value" },
	{ T("[1"), "1:3: ", "the end of the text", "',' or ']'" },
	{ T("[1,"), "1:4: ", "the end of the text", "a value" },
	{ T("[1,]"), "1:4: ", "']'", "no trailing comma in front of it" },
	{ T("[\n1,\n]"), "3:1: ", "']'", "no trailing comma in front of it" },
	{ T("[,1]"), "1:2: ", "','", "a value" },
	{ T("[1,,2]"), "1:4: ", "','", "a value" },
	{ T("[1 2]"), "1:4: ", "'2'", "',' or ']'" },
	{ T("[\"a\" \"hunter2\"]"), "1:6: ", "'\"'", "',' or ']'" },
	{ T("[1:2]"), "1:3: ", "':'", "',' or ']'" },
	{ T("[1}"), "1:3: ", "'}'", "',' or ']'" },
	{ T("[}"), "1:2: ", "'}'", "a value" },
	{ T("]"), "1:1: ", "']'", "a value" },
	{ T("[[1]"), "1:5: ", "the end of the text", "',' or ']'" },
	/* objects */
	{ T("{"), "1:2: ", "the end of the text", "a name in double quotes" },
	{ T("{,"), "1:2: ", "','", "a name in double quotes" },
	{ T("{]"), "1:2: ", "']'", "a name in double quotes" },
	{ T("{1:2}"), "1:2: ", "'1'", "a name in double quotes" },
	{ T("{a:2}"), "1:2: ", "'a'", "a name in double quotes" },
	{ T("{'a':2}"), "1:2: ", "'''", "a name in double quotes" },
	{ T("{ // x\n"), "1:3: ", "'/'", "a name in double quotes" },
	{ T("{\"a\""), "1:5: ", "the end of the text", "':' after the name" },
	{ T("{\"a\" 1}"), "1:6: ", "'1'", "':' after the name" },
	{ T("{\"a\",\"b\"}"), "1:5: ", "','", "':' after the name" },
	{ T("{\"a\"}"), "1:5: ", "'}'", "':' after the name" },
	{ T("{\"a\"=1}"), "1:5: ", "'='", "':' after the name" },
	{ T("{\"a\":"), "1:6: ", "the end of the text", "a value" },
	{ T("{\"a\":}"), "1:6: ", "'}'", "a value" },
	{ T("{\"a\"::1}"), "1:6: ", "':'", "a value" },
	{ T("{\"a\":1"), "1:7: ", "the end of the text", "',' or '}'" },
	{ T("{\"a\":1]"), "1:7: ", "']'", "',' or '}'" },
	{ T("{\"a\":1,"), "1:8: ", "the end of the text", "a name in double quotes" },
	{ T("{\"a\":1,}"), "1:8: ", "'}'", "no trailing comma in front of it" },
	{ T("{\n\t\"a\": 1\n\t\"b\": 2\n}"), "3:2: ", "'\"'", "',' or '}'" },
	{ T("{\r\n  \"a\": 1;\r\n}"), "2:9: ", "';'", "',' or '}'" },
	{ T("\xEF\xBB\xBF{\"a\":1,\n}"), "2:1: ", "'}'", "no trailing comma in front of it" },
	{ T("\xEF\xBB\xBF{;"), "1:2: ", "';'", "a name in double quotes" },
	/* a name that stands twice */
	{ T("{\"a\":1,\"a\":2}"), "1:8: ", "this name again", "its value is already at 1:6" },
	{ T("{\"\":1,\"\":2}"), "1:7: ", "this name again", "already at 1:5" },
	{ T("{\n \"host\": 1,\n \"port\": {\"host\": 2},\n  \"host\": 3\n}"), "4:3: ",
	  "this name again", "already at 2:10" },
	{ T("{\"b\":0,\"c\":{\"x\":1,\"y\":2,\"x\":3},\"a\":0}"), "1:25: ", "this name again", "at 1:17" },
	{ T("{\"ab\":1,\"c\":0,\"\\u0061b\":2}"), "1:15: ", "this name again", "at 1:7" },
	{ T("{\"a\":1,\"a\":2,\"a\":3}"), "1:8: ", "this name again", "at 1:6" },
	{ T("{\"c\":0,\"a\":1,\"b\":2,\"c\":3}"), "1:20: ", "this name again", "at 1:6" },
	{ T("{\"\xC3\xA4\\n\\u001b\":1,\"\xC3\xA4\\n\\u001b\":2}"), "1:17: ", "this name again", "at 1:15" },
	/* numbers */
	{ T("-"), "1:2: ", "the end of the text", "a digit" },
	{ T("[-]"), "1:3: ", "']'", "a digit" },
	{ T("--1"), "1:2: ", "'-'", "a digit" },
	{ T("+1"), "1:1: ", "'+'", "a value" },
	{ T(".5"), "1:1: ", "'.'", "a value" },
	{ T("-.5"), "1:2: ", "'.'", "a digit" },
	{ T("01"), "1:2: ", "'1'", "the end of the text" },
	{ T("[-00]"), "1:4: ", "'0'", "',' or ']'" },
	{ T("00.5"), "1:2: ", "'0'", "the end of the text" },
	{ T("1."), "1:3: ", "the end of the text", "a digit" },
	{ T("[1.]"), "1:4: ", "']'", "a digit" },
	{ T("1.e5"), "1:3: ", "'e'", "a digit" },
	{ T("1.5.5"), "1:4: ", "'.'", "the end of the text" },
	{ T("1e"), "1:3: ", "the end of the text", "a digit" },
	{ T("1e+"), "1:4: ", "the end of the text", "a digit" },
	{ T("1e+-1"), "1:4: ", "'-'", "a digit" },
	{ T("1e1.5"), "1:4: ", "'.'", "the end of the text" },
	{ T("1 e5"), "1:3: ", "'e'", "the end of the text" },
	{ T("- 1"), "1:2: ", "' '", "a digit" },
	{ T("0x10"), "1:2: ", "'x'", "the end of the text" },
	{ T("[1_000]"), "1:3: ", "'_'", "',' or ']'" },
	{ T("1\xD9\xA1"), "1:2: ", "the character U+0661", "the end of the text" },
	{ T("Infinity"), "1:1: ", "a word without quotes", "a value" },
	{ T("-Infinity"), "1:2: ", "'I'", "a digit" },
	/* strings */
	{ T("\""), "1:2: ", "the end of the text", "'\"' at the end of the string" },
	{ T("\"hunter2"), "1:9: ", "the end of the text", "'\"' at the end of the string" },
	{ T("[\"hunter2\n\"]"), "1:10: ", "the end of the line", "'\"' at the end of the string" },
	{ T("[\"hunter2\r\n\"]"), "1:10: ", "the end of the line", "at the end of the string" },
	{ T("{\"a: 1}\n"), "1:8: ", "the end of the line", "'\"' at the end of the string" },
	{ T("\"\t\""), "1:2: ", "octet 0x09", "\\t" },
	{ T("\"a\x1F\""), "1:3: ", "octet 0x1f", "an escape sequence" },
	{ T("\"a\0b\""), "1:3: ", "octet 0x00", "an escape sequence" },
	{ T("\"hunter2\x1B[31m\""), "1:9: ", "octet 0x1b", "an escape sequence" },
	{ T("\"\\"), "1:3: ", "the end of the text", "one of \"\\/bfnrtu" },
	{ T("\"\\\""), "1:4: ", "the end of the text", "'\"' at the end of the string" },
	{ T("\"\\\\\\\""), "1:6: ", "the end of the text", "'\"' at the end of the string" },
	{ T("\"\\x41\""), "1:3: ", "'x'", "one of \"\\/bfnrtu" },
	{ T("\"C:\\Users\""), "1:5: ", "'U'", "(a backslash is written \\\\)" },
	{ T("\"\\0\""), "1:3: ", "'0'", "one of \"\\/bfnrtu" },
	{ T("\"\\\0\""), "1:3: ", "octet 0x00", "one of \"\\/bfnrtu" },
	{ T("\"\\\n\""), "1:3: ", "the end of the line", "one of \"\\/bfnrtu" },
	{ T("\"\\\xC3\xA4\""), "1:3: ", "the character U+00E4", "one of \"\\/bfnrtu" },
	{ T("\"\\u"), "1:4: ", "the end of the text", "four hexadecimal digits" },
	{ T("\"\\u004\""), "1:7: ", "'\"'", "four hexadecimal digits" },
	{ T("\"\\u00g1\""), "1:6: ", "'g'", "four hexadecimal digits" },
	{ T("\"\\u00@1\""), "1:6: ", "'@'", "four hexadecimal digits" },
	{ T("\"\\u00\0" "1\""), "1:6: ", "octet 0x00", "four hexadecimal digits" },
	{ T("\"\\u+041\""), "1:4: ", "'+'", "four hexadecimal digits" },
	{ T("\"\\u 041\""), "1:4: ", "' '", "four hexadecimal digits" },
	{ T("\"\\u0x41\""), "1:5: ", "'x'", "four hexadecimal digits" },
	{ T("\"\\U0041\""), "1:3: ", "'U'", "one of \"\\/bfnrtu" },
	{ T("\"a\\u0000\""), "1:3: ", "\\u0000", "a character" },
	{ T("\"a\\ud800\""), "1:3: ", "half a surrogate pair", "both" },
	{ T("\"\\udbff\\u"), "1:10: ", "the end of the text", "four hexadecimal digits" },
	{ T("\"\\ud83d"), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\ud83d\\"), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\ud83d\\n\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\ud83d\\u0041\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\ud83d\\udbff\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\ud83d\\ue000\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\ud83d\\ud83d\\ude00\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\ud83dx\\ude00\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\ude00\\ud83d\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\ude00\\ude00\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\udc00\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\\udfff\""), "1:2: ", "half a surrogate pair", "both" },
	{ T("\"\xE4\""), "1:2: ", "octet 0xe4", "a character in UTF-8" },
	{ T("\"ab\xC3\""), "1:4: ", "octet 0xc3", "a character in UTF-8" },
	{ T("\"\xC3\xA4\xC3"), "1:4: ", "octet 0xc3", "a character in UTF-8" },
	{ T("\"\x80\""), "1:2: ", "octet 0x80", "a character in UTF-8" },
	{ T("\"\xED\xA0\xBD\xED\xB8\x80\""), "1:2: ", "octet 0xed", "a character in UTF-8" },
	{ T("\"\xC0\x80\""), "1:2: ", "octet 0xc0", "a character in UTF-8" },
	{ T("\"\xF4\x90\x80\x80\""), "1:2: ", "octet 0xf4", "a character in UTF-8" },
	{ T("{\"\xFC\":1}"), "1:3: ", "octet 0xfc", "a character in UTF-8" },
};

static void test_invalid(void)
{
	for (size_t i = 0; i < sizeof invalid / sizeof invalid[0]; i++) {
		struct err e;
		struct json *root = parse(invalid[i].text, invalid[i].n, &e);
		const char *place = invalid[i].place, *expected = invalid[i].expected;
		const char *found = strstr(e.text, invalid[i].found);
		const char *but = strstr(e.text, " but expected ");

		if (check(root == NULL, "accepted: %s", invalid[i].text) &&
		    refused_well(invalid[i].text, invalid[i].n, &e)) {
			check(strstr(e.text, place) == e.text, "%zu: not %s%s", i, place, e.text);
			check(found != NULL && found < but, "%zu: not found: %s", i, e.text);
			check(strstr(but, expected) != NULL, "%zu: not expected: %s", i, e.text);
		}
		json_free(root);
	}
}

/* ---- a configuration, and every way to cut or spoil it ---- */

static const char sample[] =
	"\xEF\xBB\xBF{\r\n"
	"\t\"destination\": \"/mnt/usb/mail\",\r\n"
	"\t\"total_processes\": 4,\r\n"
	"\t\"keep_duplicates\": false, \"require_mount\": true,\r\n"
	"\t\"ignore_mailboxes\": [\"Spam\", \"Tr\\u00e4sh/*\", \"\\ud83d\\ude00\"],\r\n"
	"\t\"timeout\": 1.2e+2,\r\n"
	"\t\"oauth2\": {},\r\n"
	"\t\"accounts\": [\r\n"
	"\t\t{\"email\": \"m\xC3\xBCller@example.org\", \"host\": \"imap.example.org\",\r\n"
	"\t\t \"password\": \"hunter2 \\\"\\\\\xE2\x82\xAC\",\r\n"
	"\t\t \"port\": -993, \"ca_file\": null}\r\n"
	"\t]\r\n"
	"}";

static void test_sample(void)
{
	static const char octets[] = "\0\x01\t\n \"\\[]{},:0-+.eutf/x'"
	                             "\x7F\x80\xBF\xC3\xE2\xED\xF0\xFF";
	size_t n = sizeof sample - 1;
	char changed[sizeof sample];
	struct err e;
	struct json *root = parse(sample, n, &e);
	const struct json *accounts, *account, *v;

	if (check(root != NULL, "the sample is refused: %s", e.text)) {
		sound(sample, n, root, NULL);
		accounts = json_get(root, "accounts");
		if (check(accounts != NULL && accounts->count == 1, "sample: accounts")) {
			account = accounts->child;
			check(account->line == 9 && account->column == 3, "sample: account at");
			v = json_get(account, "password");
			check(v != NULL && strcmp(v->text, "hunter2 \"\\\xE2\x82\xAC") == 0 &&
			      strcmp(v->key, "password") == 0 && v->line == 10 && v->column == 16,
			      "sample: password");
			v = json_get(account, "port");
			check(v != NULL && v->number == -993 && v->integral, "sample: port");
			check(json_get(account, "Host") == NULL, "sample: Host");
			check(json_get(account, "hos") == NULL, "sample: hos");
			check(json_get(account, "accounts") == NULL, "sample: accounts in account");
		}
		v = json_get(root, "ignore_mailboxes");
		check(v != NULL && v->count == 3 && json_get(v, "Spam") == NULL, "sample: ignored");
		check(json_get(json_get(root, "timeout"), "x") == NULL, "sample: timeout.x");
	}
	json_free(root);

	for (size_t cut = 0; cut < n; cut++)
		check(!either(sample, cut), "the first %zu octets of the sample are accepted", cut);
	for (size_t at = 0; at < n; at++) {
		memcpy(changed, sample, n);
		memmove(changed + at, changed + at + 1, n - at - 1);
		either(changed, n - 1);
		for (size_t i = 0; i < sizeof octets; i++) {
			memcpy(changed, sample, n);
			changed[at] = octets[i];
			either(changed, n);
			memmove(changed + at + 1, sample + at, n - at);
			either(changed, n + 1);
		}
	}
}

/* ---- UTF-8 ---- */

static size_t encode(char *out, uint32_t u)
{
	size_t n = 0;

	if (u < 0x80) {
		out[n++] = (char)u;
		return n;
	}
	if (u < 0x800) {
		out[n++] = (char)(0xC0 + u / 64);
	} else {
		if (u < 0x10000) {
			out[n++] = (char)(0xE0 + u / 4096);
		} else {
			out[n++] = (char)(0xF0 + u / 262144);
			out[n++] = (char)(0x80 + u / 4096 % 64);
		}
		out[n++] = (char)(0x80 + u / 64 % 64);
	}
	out[n++] = (char)(0x80 + u % 64);
	return n;
}

/* Every character there is comes out as it went in, written plainly and as \uXXXX. */
static void test_characters(void)
{
	struct text plain = { NULL, 0, 0 }, escaped = { NULL, 0, 0 }, decoded = { NULL, 0, 0 };

	for (uint32_t u = 1; u <= 0x10FFFF; u++) {
		uint32_t high = 0xD800 + (u - 0x10000) / 1024, low = 0xDC00 + u % 1024;
		char octets[4], hex[16];
		size_t n = encode(octets, u);

		if (u % 0x1000 == 1) {
			plain.n = escaped.n = decoded.n = 0;
			put(&plain, "\"", 1);
			put(&escaped, "\"", 1);
			put(&decoded, "", 0);
		}
		if (u < 0xD800 || u > 0xDFFF) {
			if (u >= 0x10000)
				snprintf(hex, sizeof hex, "\\u%04lx\\u%04lX", (unsigned long)high,
				         (unsigned long)low);
			else
				snprintf(hex, sizeof hex, "\\u%04lx", (unsigned long)u);
			put(&escaped, hex, strlen(hex));
			if (u < 0x20 || u == '"' || u == '\\')
				put(&plain, hex, strlen(hex));
			else
				put(&plain, octets, n);
			put(&decoded, octets, n);
		}
		if (u % 0x1000 == 0 || u == 0x10FFFF) {
			struct text *both[] = { &plain, &escaped };

			for (int i = 0; i < 2; i++) {
				struct err e;
				struct json *root;

				put(both[i], "\"", 1);
				root = parse(both[i]->s, both[i]->n, &e);
				check(root != NULL && strcmp(root->text, decoded.s) == 0,
				      "characters before U+%04lX, %s: %s", (unsigned long)u,
				      i ? "escaped" : "plain", e.text);
				json_free(root);
			}
		}
	}
	free(plain.s);
	free(escaped.s);
	free(decoded.s);
}

/* Do these octets begin with a character other than ASCII? By the grammar of RFC 3629 section 4. */
static bool is_utf8(const unsigned char *s, size_t n)
{
	static const struct { unsigned char first, last, low, high, tail; } forms[] = {
		{ 0xC2, 0xDF, 0x80, 0xBF, 0 },
		{ 0xE0, 0xE0, 0xA0, 0xBF, 1 },
		{ 0xE1, 0xEC, 0x80, 0xBF, 1 },
		{ 0xED, 0xED, 0x80, 0x9F, 1 },
		{ 0xEE, 0xEF, 0x80, 0xBF, 1 },
		{ 0xF0, 0xF0, 0x90, 0xBF, 2 },
		{ 0xF1, 0xF3, 0x80, 0xBF, 2 },
		{ 0xF4, 0xF4, 0x80, 0x8F, 2 },
	};

	for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++) {
		if (s[0] < forms[i].first || s[0] > forms[i].last)
			continue;
		if (n != 2u + forms[i].tail || s[1] < forms[i].low || s[1] > forms[i].high)
			return false;
		for (size_t k = 2; k < n; k++)
			if (s[k] < 0x80 || s[k] > 0xBF)
				return false;
		return true;
	}
	return false;
}

static void one_sequence(unsigned a, unsigned b, int c, int d)
{
	size_t n = d >= 0 ? 4 : c >= 0 ? 3 : 2;
	unsigned char s[] = { (unsigned char)a, (unsigned char)b, (unsigned char)c,
	                      (unsigned char)d };
	char text[8] = "\"";
	struct err e;
	struct json *root;

	memcpy(text + 1, s, n);
	text[n + 1] = '"';
	root = parse(text, n + 2, &e);
	check((root != NULL) == is_utf8(s, n), "%02x %02x %02x %02x (%zu octets): %s", s[0], s[1],
	      s[2], s[3], n, root != NULL ? "accepted" : e.text);
	json_free(root);
}

static void test_utf8(void)
{
	static const unsigned char tails[] = { 0x41, 0x7F, 0x80, 0x8F, 0x90, 0xBF, 0xC0, 0xFF };
	const size_t n = sizeof tails;

	for (unsigned a = 0x80; a <= 0xFF; a++) {
		for (unsigned b = 0x80; b <= 0xFF; b++)
			one_sequence(a, b, -1, -1);
		one_sequence(a, 'x', -1, -1);
		if (a < 0xE0)
			continue; /* two good ones in a row would be judged as one */
		for (unsigned b = 0x70; b <= 0xCF; b++)
			for (size_t i = 0; i < n; i++) {
				one_sequence(a, b, tails[i], -1);
				for (size_t k = 0; a >= 0xF0 && k < n; k++)
					one_sequence(a, b, tails[i], tails[k]);
			}
	}
}

/* ---- limits ---- */

static void test_depth(void)
{
	struct text t = { NULL, 0, 0 };
	struct err e;
	struct json *root;

	puts_n(&t, "[", JSON_DEPTH_MAX);
	puts_n(&t, "]", JSON_DEPTH_MAX);
	check(either(t.s, t.n), "%d arrays deep", (int)JSON_DEPTH_MAX);
	t.n = 0;
	puts_n(&t, "{\"a\":", JSON_DEPTH_MAX);
	puts_n(&t, "1", 1);
	puts_n(&t, "}", JSON_DEPTH_MAX);
	check(either(t.s, t.n), "%d objects deep", (int)JSON_DEPTH_MAX);

	for (size_t more = 1; more < 200000; more = more * 7 + 1) {
		t.n = 0;
		puts_n(&t, "[{\"a\":", JSON_DEPTH_MAX / 2);
		puts_n(&t, more % 2 ? "[" : "{\"a\":", more);
		root = parse(t.s, t.n, &e);
		check(root == NULL && strncmp(e.text, "1:97: found ", 12) == 0 &&
		      strstr(e.text, "inside each other") != NULL, "%zu too deep: %s", more,
		      e.text);
		json_free(root);
		refused_well(t.s, t.n, &e);
	}

	t.n = 0;
	puts_n(&t, "[{\"a\":", JSON_DEPTH_MAX / 2 - 1);
	puts_n(&t, "[", 1);
	puts_n(&t, "[],{},", 100);
	puts_n(&t, "{\"a\":[", 1); /* one too many, but the hundred before it are closed */
	check(!either(t.s, t.n), "too deep after a hundred");
	t.n -= 6;
	puts_n(&t, "[]]", 1);
	puts_n(&t, "}]", JSON_DEPTH_MAX / 2 - 1);
	check(either(t.s, t.n), "a hundred beside each other at the bottom");
	free(t.s);
}

static void test_size(void)
{
	static const char *const pieces[] = {
		"0,", "-1,", "null,", "[],", "[0],", "{},", "\"\",", "\"\\n\",", "\"\\\"\",",
	};
	const size_t max = JSON_OCTETS_MAX;
	struct text t = { NULL, 0, 0 };
	struct err e;
	struct json *root;

	/* the limit, to the octet */
	puts_n(&t, " ", max - 1);
	puts_n(&t, "1", 1);
	check(either(t.s, max), "JSON_OCTETS_MAX octets");
	puts_n(&t, " ", 1);
	root = parse(t.s, t.n, &e);
	check(root == NULL && strstr(e.text, "found 4194305 octets") != NULL &&
	      strstr(e.text, "4194304") != NULL, "one octet more: %s", e.text);
	refused_well(t.s, t.n, &e);

	/* one long string, one long number */
	memset(t.s, 'a', max);
	t.s[0] = t.s[max - 1] = '"';
	root = parse(t.s, max, &e);
	check(root != NULL && strlen(root->text) == max - 2, "a long string: %s", e.text);
	json_free(root);
	memset(t.s, '9', max);
	root = parse(t.s, max, &e);
	check(root != NULL && !root->integral && strlen(root->text) == max, "a long number");
	json_free(root);

	/* as many small values as there is room for */
	for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++) {
		size_t n = strlen(pieces[i]), times = (max - 1) / n;

		t.n = 0;
		puts_n(&t, "[", 1);
		puts_n(&t, pieces[i], times);
		t.s[t.n - 1] = ']';
		root = parse(t.s, t.n, &e);
		check(root != NULL && root->count == times, "many %s %s", pieces[i], e.text);
		json_free(root);
	}
	free(t.s);
}

/* As many members as an object may have; one of them twice, and one too many. */
static void test_members(void)
{
	static const char *const last[] = { "\"last\":0}", "\"1eef\":0}", "\"last\":0,\n\"more\":0}" };

	for (int i = 0; i < 3; i++) {
		struct text t = { NULL, 0, 0 };
		struct err e;
		struct json *root;
		const struct json *v;
		char member[32];

		puts_n(&t, "{\n", 1);
		for (unsigned k = 0; k < JSON_MEMBERS_MAX - 1; k++) {
			snprintf(member, sizeof member, "\"%x\":0,\n", k * 7919);
			puts_n(&t, member, 1);
		}
		puts_n(&t, last[i], 1);
		root = parse(t.s, t.n, &e);
		if (i > 0) {
			check(root == NULL && strncmp(e.text, i == 1 ? "1001:1: " : "1002:1: ", 8) == 0 &&
			      strstr(e.text, i == 1 ? "this name again but expected it once: its value is already at 3:8"
						   : "fewer members") != NULL, "%d: %s", i, e.text);
		} else if (check(root != NULL && root->count == JSON_MEMBERS_MAX, "many names: %s", e.text)) {
			v = json_get(root, "last");
			check(v != NULL && v->next == NULL && v->line == 1001, "the last of many");
			check(strcmp(root->child->next->key, "1eef") == 0, "the order of many");
		}
		json_free(root);
		free(t.s);
	}
}

/* ---- writing ---- */

static void test_escape(void)
{
	static const struct { const char *text, *escaped; } texts[] = {
		{ "", "\"\"" }, { "plain /", "\"plain /\"" }, { "a\"b\\c", "\"a\\\"b\\\\c\"" },
		{ "\n\x1f\x7f", "\"\\u000a\\u001f\\u007f\"" }, { "\xC3\xA9", "\"\xC3\xA9\"" },
		{ "\xF0\x9F\x98\x80", "\"\xF0\x9F\x98\x80\"" },
		{ "\xFFx\xC3", "\"\\ufffdx\\ufffd\"" }, { "\xED\xA0\x80", "\"\\ufffd\\ufffd\\ufffd\"" },
	};
	static const struct { size_t size; const char *escaped; } cuts[] = {
		{ 3, "\"\"" }, { 4, "\"a\"" }, { 5, "\"a\"" }, { 6, "\"a\xC3\xA9\"" }, { 11, "\"a\xC3\xA9\"" },
	};
	char out[64];
	struct err e = { 0 };

	for (size_t i = 0; i < N(texts); i++) {
		size_t n = json_escape(out, sizeof out, texts[i].text);
		struct json *root;

		check(n == strlen(texts[i].escaped) && strcmp(out, texts[i].escaped) == 0, "escape %zu: %s", i, out);
		root = json_parse(out, n, &e);
		check(root != NULL && (strstr(out, "fffd") != NULL || strcmp(root->text, texts[i].text) == 0),
		      "escape %zu, read again", i);
		json_free(root);
	}
	for (size_t i = 0; i < N(cuts); i++)
		check(json_escape(out, cuts[i].size, "a\xC3\xA9\1") == 0 && strcmp(out, cuts[i].escaped) == 0,
		      "cut at %zu: %s", cuts[i].size, out);
	check(json_escape(out, 12, "a\xC3\xA9\1") == 11, "it fits");
}

/* ---- the rest ---- */

static void test_names(void)
{
	static const char *const names[] = {
		[JSON_NULL] = "null", [JSON_BOOL] = "true or false", [JSON_NUMBER] = "a number",
		[JSON_STRING] = "a string", [JSON_ARRAY] = "an array", [JSON_OBJECT] = "an object",
	};

	for (int i = JSON_NULL; i <= JSON_OBJECT; i++)
		check(strcmp(json_type_name((enum json_type)i), names[i]) == 0, "type %d", i);
	json_free(NULL);
}

int main(void)
{
	test_valid();
	test_invalid();
	test_sample();
	test_characters();
	test_utf8();
	test_depth();
	test_size();
	test_members();
	test_escape();
	test_names();
	return checked("t_json");
}
