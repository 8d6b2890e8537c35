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
		{ "https://x/?error=x&error_description=AADSTS65004%3a+no", "!x: AADSTS65004: no; it was declined" },
		{ "https://x/?code=%", "%" }, { "https://x/?code=%4", "%4" }, { "https://x/?code=%zz", "%zz" },
	};
	const struct oauth oauth = { .type = OAUTH_O365 };

	for (size_t i = 0; i < N(rows); i++) {
		char pasted[200], code[20];
		struct err e = { 0 };
		struct oauth_job k = { .oauth = &oauth, .e = &e };
		int result;

		snprintf(pasted, sizeof pasted, "%s", rows[i].pasted);
		result = oauth_code(&k, pasted, "S", code, sizeof code);
		if (rows[i].code[0] == '!')
			check(result == -1 && e.code == E_ACCOUNT && strstr(e.text, rows[i].code + 1) != NULL,
			      "%s: %s", rows[i].pasted, e.text);
		else
			check(result == 0 && strcmp(code, rows[i].code) == 0, "%s: %s %s", rows[i].pasted, code, e.text);
	}
}

/* What an entry of "oauth2" is, with what is built in. */
static void test_providers(void)
{
#define MS "https://login.microsoftonline.com/"
	static const struct { const char *entry, *is[5]; } rows[] = {
		{ "\"type\": \"o365\", \"tenant_id\": \"contoso.example\"",
		  { MS "contoso.example/oauth2/v2.0/authorize", MS "contoso.example/oauth2/v2.0/token",
		    MS "contoso.example/oauth2/v2.0/devicecode",
		    "https://outlook.office.com/IMAP.AccessAsUser.All offline_access", MS "common/oauth2/nativeclient" } },
		{ "\"type\": \"o365\", \"grant\": \"client_credentials\", \"client_secret\": \"s\"",
		  { MS "common/oauth2/v2.0/authorize", MS "common/oauth2/v2.0/token", MS "common/oauth2/v2.0/devicecode",
		    "https://outlook.office365.com/.default", MS "common/oauth2/nativeclient" } },
		{ "\"type\": \"o365\", \"token_url\": \"https://login.example/token\"",
		  { MS "common/oauth2/v2.0/authorize", "https://login.example/token", "",
		    "https://outlook.office.com/IMAP.AccessAsUser.All offline_access", MS "common/oauth2/nativeclient" } },
		{ "\"type\": \"google\"", { "https://accounts.google.com/o/oauth2/v2/auth", "https://oauth2.googleapis.com/token", "",
					"https://mail.google.com/", "http://127.0.0.1/" } },
		{ "\"type\": \"custom\", \"auth_url\": \"https://a\", \"token_url\": \"https://t\", \"device_url\": \"https://d\", "
		  "\"scope\": \"s\", \"redirect\": \"http://r\"", { "https://a", "https://t", "https://d", "s", "http://r" } },
	};

	for (size_t i = 0; i < N(rows); i++) {
		struct config c = { .path = "test", .folder = "." };
		char text[1000];
		int n = snprintf(text, sizeof text, "{\"destination\": \"d\", \"oauth2\": {\"x\": {\"client_id\": \"i\", %s}}, "
				 "\"accounts\": [{\"email\": \"a\", \"host\": \"h\", \"oauth2\": \"x\"}]}", rows[i].entry);

		if (check(config_take(&c, text, (size_t)n) == 0, "provider %zu", i)) {
			const struct oauth *o = c.oauths;
			const char *is[] = { o->auth_url, o->token_url, o->device_url, o->scope, o->redirect };

			for (int k = 0; k < 5; k++)
				check(strcmp(is[k], rows[i].is[k]) == 0, "provider %zu, %d: %s", i, k, is[k]);
		}
		json_free(c.root);
		free(c.oauths);
		free(c.accounts);
	}
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
		snprintf(k.error, sizeof k.error, "%s", oauth_text(answer, "error"));
		if (answer != NULL)
			oauth_refused(&k, oauth_text(answer, "error_description"), rows[i].status);
		else
			oauth_refused(&k, "", rows[i].status);
		check((int)e.code == rows[i].code && strstr(e.text, rows[i].text) != NULL, "refused %zu: %s", i, e.text);
		check(strchr(e.text, '\n') == NULL && strstr(e.text, "Trace") == NULL, "refused %zu: %s", i, e.text);
		json_free(answer);
	}
}

/* Each number that is known has its hint. */
static void test_hints(void)
{
	static const struct { const char *numbers, *hint; } rows[] = {
		{ "65001 90094 90095", "administrator approve" }, { "50105", "assign" }, { "50076 50079 50078 50074", "second factor" },
		{ "70043", "exempt" }, { "700082 70008", "not used" }, { "50173 50132 50133", "password changed" },
		{ "70000", "client_id" }, { "53003 530036", "--paste" }, { "50097 53000 53001 530084", "only an administrator" },
		{ "7000218", "public client" }, { "700025", "remove" }, { "50011", "redirect" }, { "7000112 70001 700011", "client_id" },
		{ "50194 9002332 9001023 50020 500208", "tenant_id" }, { "70011 65005 650057", "scope" },
		{ "70019 70018", "begin again" }, { "65004", "declined" },
	};
	const struct oauth oauth = { .type = OAUTH_O365 };

	for (size_t i = 0; i < N(rows); i++)
		for (const char *number = rows[i].numbers; *number != '\0'; number += strcspn(number, " "), number += *number == ' ') {
			struct err e = { 0 };
			struct oauth_job k = { .oauth = &oauth, .e = &e, .error = "invalid_client" };
			char words[40];

			snprintf(words, sizeof words, "AADSTS%.*s: x", (int)strcspn(number, " "), number);
			oauth_refused(&k, words, 400);
			check(e.code == E_ACCOUNT && strstr(e.text, rows[i].hint) != NULL, "%s: %s", words, e.text);
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
	static char text[4000];

	for (size_t i = 0; i < N(files) * N(answers); i++) {
		const char *file = files[i / 2];
		struct json *answer = json_parse(answers[i % 2], strlen(answers[i % 2]), &e);
		uint32_t count = 0;

		for (int again = 0; again < 2; again++) { /* the same once more changes nothing but times */
			struct oauth_job k = { .oauth = &oauth, .e = &e };
			struct string t = string_new(4000);

			k.root = json_parse(file, strlen(file), &e);
			k.refresh = oauth_newest(&k, "RefreshToken", "last_modification_time");
			oauth_merge(&k, answer, &t);
			json_free(k.root);
			k.root = json_parse(t.at, t.n, &e);
			if (!check(k.root != NULL && !t.full, "merge %zu: %s %s", i, t.at, e.text))
				return;
			check(again == 0 || count == k.root->count, "merge %zu again: %s", i, t.at);
			count = k.root->count;
			k.refresh = oauth_newest(&k, "RefreshToken", "last_modification_time");
			k.access = oauth_newest(&k, "AccessToken", "expires_on");
			check(strcmp(oauth_text(k.access, "secret"), "a") == 0 &&
			      strcmp(oauth_text(k.refresh, "secret"), i % 2 == 1 ? "new" : i / 2 == 4 ? "old" : i / 2 == 3 ? "7" : "")
			      == 0, "merge %zu: %s", i, t.at);
			check(strstr(file, "Other") == NULL || strstr(t.at, "\"Other\":[[],{},true,1e3,\"{\"]") != NULL, "%s", t.at);
			if (again == 0)
				file = strcpy(text, t.at);
			json_free(k.root);
			string_free(&t);
		}
		json_free(answer);
	}
}

int main(void)
{
	test_site();
	test_text();
	test_code();
	test_providers();
	test_refused();
	test_hints();
	test_merge();
	return checked("t_oauth");
}
