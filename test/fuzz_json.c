/*
 * fuzz_json - a libFuzzer target for json.c
 *
 * A text is either refused with a place and a reason, or its tree, written as JSON and parsed
 * again, is the same tree.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FUZZ
#include "unit.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Parse a copy of exactly this size that is gone afterwards. */
static struct json *parse(const void *text, size_t n, struct err *e)
{
	char *copy = malloc(n > 0 ? n : 1);
	struct json *root;

	must(copy != NULL);
	if (n > 0)
		memcpy(copy, text, n);
	*e = (struct err){ .code = E_NONE };
	root = json_parse(copy, n, e);
	free(copy);
	must((root == NULL) == (e->code != E_NONE));
	return root;
}

static void write_string(FILE *out, const char *s)
{
	putc('"', out);
	for (; *s != '\0'; s++) {
		if ((unsigned char)*s < ' ' || *s == '"' || *s == '\\')
			fprintf(out, "\\u%04x", (unsigned)*s);
		else
			putc(*s, out);
	}
	putc('"', out);
}

static void write_value(FILE *out, const struct json *v)
{
	bool object = v->type == JSON_OBJECT;
	uint32_t count = 0;

	must(v->line > 0 && v->column > 0);
	switch (v->type) {
	case JSON_NULL:
		fputs("null", out);
		break;
	case JSON_BOOL:
		fputs(v->number ? "true" : "false", out);
		break;
	case JSON_NUMBER:
		if (v->integral && strcmp(v->text, "-0") != 0)
			fprintf(out, "%" PRId64, v->number);
		else
			fputs(v->text, out);
		break;
	case JSON_STRING:
		write_string(out, v->text);
		break;
	case JSON_ARRAY:
	case JSON_OBJECT:
		putc(object ? '{' : '[', out);
		for (const struct json *w = v->child; w != NULL; w = w->next, count++) {
			must((w->key != NULL) == object);
			if (object) {
				must(count > 50 || json_get(v, w->key) == w);
				write_string(out, w->key);
				putc(':', out);
			}
			write_value(out, w);
			if (w->next != NULL)
				putc(',', out);
		}
		putc(object ? '}' : ']', out);
		break;
	}
	must(count == v->count);
}

static char *write_tree(const struct json *root, size_t *n)
{
	char *text = NULL;
	FILE *out = open_memstream(&text, n);

	must(out != NULL);
	write_value(out, root);
	must(fclose(out) == 0);
	return text;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct err e;
	struct json *root = parse(data, size, &e);
	unsigned line, column;
	char *text, *again;
	size_t n, m;

	if (root == NULL) {
		must(e.code == E_FORMAT && sscanf(e.text, "%u:%u: found ", &line, &column) == 2);
		must(strstr(e.text, " but expected ") != NULL);
		for (const char *s = e.text; *s != '\0'; s++)
			must(*s >= ' ' && *s <= '~');
		return 0;
	}
	text = write_tree(root, &n);
	json_free(root);
	root = parse(text, n, &e);
	must(root != NULL);
	again = write_tree(root, &m);
	json_free(root);
	must(n == m && memcmp(text, again, n) == 0);
	free(text);
	free(again);
	return 0;
}
