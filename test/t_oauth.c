/*
 * t_oauth - unit tests of the chapters http and oauth: what needs no provider
 *
 * Prints what failed and one summary line; exits 0 if nothing did.
 */
#define main program_main
#include "../imap_backup.c"
#undef main
#include "unit.h"

#define N(table) (sizeof (table) / sizeof *(table))

static void test_site(void)
{
	static const struct { const char *url, *site; } rows[] = {
		{ "https://example.org", "https://example.org" }, { "http://example.org:80/secret", "http://example.org:80" },
		{ "https://me:pw@host/path?query#part", "https://host" }, { "https://me:p@w@host?@x", "https://host" },
		{ "https://[::1]:9/x", "https://[::1]:9" }, { "HTTPS://h#u@x", "HTTPS://h" },
	};
	char out[300], url[1000] = "https://";

	for (size_t i = 0; i < N(rows); i++)
		check(strcmp(http_site(out, rows[i].url), rows[i].site) == 0, "%s: %s", rows[i].url, out);
	memset(url + 8, 'x', sizeof url - 9);
	url[sizeof url - 1] = '\0';
	check(strlen(http_site(out, url)) == 299, "a long one");
}

static void test_text(void)
{
	struct string t = string_new(100);

	string_add(&t, "a%s=%f&%j", "b%\"", "x y%\xC3\xA9-._~", "q\"\n");
	check(strcmp(t.at, "ab%\"=x%20y%25%C3%A9-._~&\"q\\\"\\u000a\"") == 0 && !t.full, "%s", t.at);
	string_free(&t);
	for (size_t size = 8; size < 40; size++) { /* never over its end, and full where it is not whole */
		t = string_new(size);
		string_add(&t, "%j%f%s", "abcdef", "g h", "ijk");
		check(t.n < size && strlen(t.at) == t.n && t.full == (strcmp(t.at, "\"abcdef\"g%20hijk") != 0),
		      "%zu octets: %s", size, t.at);
		string_free(&t);
	}
}

static void test_code(void)
{
	static const struct { const char *pasted, *code; } rows[] = {
		{ "http://127.0.0.1/?code=4/0A&scope=x", "4/0A" }, { "http://127.0.0.1/?state=S&code=4%2F0A#", "4/0A" },
		{ " 4/0A-b_c \r\n", "4/0A-b_c" }, { "4%2F0A", "4/0A" }, { "?approvalCode=no&x_code=no&code=yes", "yes" },
		{ "https://x/p?response=code%3Dyes%26state%3DS", "yes" }, { "x?y=code%253Da%25252Fb", "a/b" },
		{ "https://x/#code=yes&state=S", "yes" }, { "<a href='https://x/?code=yes'>", "yes" },
		{ "https://x/?code=yes&state=T", "!of another sign-in" }, { "", "!no code" }, { " \n", "!no code" },
		{ "https://x/", "!no code" }, { "https://x/?code_challenge=1", "!no code" },
		{ "https://x/?error=access_denied&error_description=The+user%21", "!access_denied: The user!" },
		{ "https://x/?code=%", "%" }, { "https://x/?code=%4", "%4" }, { "https://x/?code=%zz", "%zz" },
	};

	for (size_t i = 0; i < N(rows); i++) {
		char pasted[200], code[20];
		struct err e = { 0 };
		int result;

		snprintf(pasted, sizeof pasted, "%s", rows[i].pasted);
		result = oauth_code(pasted, "S", code, sizeof code, &e);
		if (rows[i].code[0] == '!')
			check(result == -1 && e.code == E_ACCOUNT && strstr(e.text, rows[i].code + 1) != NULL,
			      "%s: %s", rows[i].pasted, e.text);
		else
			check(result == 0 && strcmp(code, rows[i].code) == 0, "%s: %s %s", rows[i].pasted, code, e.text);
	}
}

static void test_items(void)
{
	const struct oauth microsoft = { .type = OAUTH_O365, .tenant_id = "contoso.example" };
	const struct oauth app = { .type = OAUTH_O365, .client_credentials = true };
	const struct oauth cloud = { .type = OAUTH_O365, .token_url = "https://login.example/token" };
	const struct oauth google = { .type = OAUTH_GOOGLE };
	const struct { const struct oauth *oauth; enum oauth_item which; const char *value; } rows[] = {
		{ &microsoft, OAUTH_AUTHORIZE, "https://login.microsoftonline.com/contoso.example/oauth2/v2.0/authorize" },
		{ &microsoft, OAUTH_TOKEN, "https://login.microsoftonline.com/contoso.example/oauth2/v2.0/token" },
		{ &app, OAUTH_DEVICE, "https://login.microsoftonline.com/common/oauth2/v2.0/devicecode" },
		{ &microsoft, OAUTH_SCOPE, "https://outlook.office.com/IMAP.AccessAsUser.All offline_access" },
		{ &app, OAUTH_SCOPE, "https://outlook.office365.com/.default" },
		{ &app, OAUTH_REDIRECT, "https://login.microsoftonline.com/common/oauth2/nativeclient" },
		{ &cloud, OAUTH_TOKEN, "https://login.example/token" }, { &cloud, OAUTH_DEVICE, "" },
		{ &google, OAUTH_AUTHORIZE, "https://accounts.google.com/o/oauth2/v2/auth" },
		{ &google, OAUTH_DEVICE, "" }, { &google, OAUTH_SCOPE, "https://mail.google.com/" },
		{ &google, OAUTH_REDIRECT, "http://127.0.0.1/" },
	};
	char out[300];

	for (size_t i = 0; i < N(rows); i++)
		check(strcmp(oauth_item(rows[i].oauth, rows[i].which, out), rows[i].value) == 0, "item %zu: %s", i,
		      oauth_item(rows[i].oauth, rows[i].which, out));
}

static void test_refused(void)
{
	static const struct { unsigned type, status; const char *answer; int code; const char *text; } rows[] = {
		{ OAUTH_GOOGLE, 400, "{\"error\":\"invalid_grant\"}", E_ACCOUNT, "\"Testing\" ends after 7 days" },
		{ OAUTH_O365, 400, "{\"error\":\"invalid_grant\",\"error_description\":\"AADSTS700082: x. Trace ID: t\"}",
		  E_ACCOUNT, "invalid_grant: AADSTS700082: x.; not used" },
		{ OAUTH_O365, 400, "{\"error\":\"invalid_grant\",\"error_description\":\"AADSTS70: x\\r\\ny\"}", E_ACCOUNT,
		  "AADSTS70: x" },
		{ OAUTH_O365, 400, "{\"error\":\"temporarily_unavailable\"}", E_NET, "temporarily_unavailable" },
		{ OAUTH_O365, 400, "{\"error\":{\"code\":1}}", E_ACCOUNT, "HTTP status 400" },
		{ OAUTH_O365, 503, "<html>", E_NET, "HTTP status 503" }, { OAUTH_O365, 429, "[]", E_NET, "HTTP status 429" },
	};

	for (size_t i = 0; i < N(rows); i++) {
		const struct oauth oauth = { .type = rows[i].type };
		struct err e = { 0 }, no_json = { 0 };
		struct oauth_job k = { .oauth = &oauth, .e = &e };
		struct json *answer = json_parse(rows[i].answer, strlen(rows[i].answer), &no_json);
		struct reply *r = allocate(sizeof *r);

		r->status = rows[i].status;
		snprintf(k.error, sizeof k.error, "%s", oauth_text(answer, "error"));
		oauth_refused(&k, answer, r);
		check((int)e.code == rows[i].code && strstr(e.text, rows[i].text) != NULL, "refused %zu: %s", i, e.text);
		check(strchr(e.text, '\n') == NULL && strstr(e.text, "Trace") == NULL, "refused %zu: %s", i, e.text);
		json_free(answer);
		free(r);
	}
}

/* Whatever a token file holds, what is made of it can be read again and holds the rest of it. */
static void test_merge(void)
{
	static const char *const files[] = {
		"{}", "{\"RefreshToken\":[],\"AccessToken\":1}", "{\"AccessToken\":{\"x\":1,\"y\":{\"client_id\":7}}}",
		"{\"RefreshToken\":{\"x\":null,\"y\":{\"client_id\":\"me\",\"secret\":7}},\"Other\":[[],{},true,1e3,\"{\"]}",
		"{\"RefreshToken\":{\"x\":{\"client_id\":\"me\",\"secret\":\"old\"}}}",
	};
	static const char *const answers[] = {
		"{\"access_token\":\"a\"}", "{\"access_token\":\"a\",\"refresh_token\":\"new\",\"expires_in\":\"99\"}",
	};
	const struct oauth oauth = { .type = OAUTH_CUSTOM, .client_id = "me", .scope = "s", .token_url = "https://h:1/t" };
	struct err e = { 0 };

	for (size_t i = 0; i < N(files) * N(answers); i++) {
		const char *file = files[i / 2];
		struct oauth_job k = { .oauth = &oauth, .e = &e, .octets = strlen(file) };
		struct json *answer = json_parse(answers[i % 2], strlen(answers[i % 2]), &e), *again, *once_more;
		struct string t;

		k.root = json_parse(file, k.octets, &e);
		k.refresh = oauth_newest(&k, "RefreshToken", "last_modification_time");
		t = oauth_merge(&k, answer);
		again = json_parse(t.at, t.n, &e);
		check(again != NULL && !t.full, "merge %zu: %s %s", i, t.at, e.text);
		json_free(k.root);
		k.root = again;
		k.refresh = oauth_newest(&k, "RefreshToken", "last_modification_time");
		k.access = oauth_newest(&k, "AccessToken", "expires_on");
		check(strcmp(oauth_text(k.access, "secret"), "a") == 0 &&
		      strcmp(oauth_text(k.refresh, "secret"), i % 2 == 1 ? "new" : i / 2 == 4 ? "old" : i / 2 == 3 ? "7" : "") == 0,
		      "merge %zu: %s", i, t.at);
		check(strstr(file, "Other") == NULL || strstr(t.at, "\"Other\":[[],{},true,1e3,\"{\"]") != NULL, "%s", t.at);
		string_free(&t);
		t = oauth_merge(&k, answer); /* the same once more changes nothing but times */
		once_more = json_parse(t.at, t.n, &e);
		check(once_more != NULL && once_more->count == again->count, "merge %zu again: %s", i, t.at);
		json_free(once_more);
		json_free(again);
		json_free(answer);
		string_free(&t);
	}
}

int main(void)
{
	test_site();
	test_text();
	test_code();
	test_items();
	test_refused();
	test_merge();
	return checked("t_oauth");
}
